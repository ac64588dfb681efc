"""Which head a checkpoint has whose configuration says that it is the embedding: what its tensors say, as transformers
decides."""

import shutil

import chex
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import rlae_jax as rj

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def with_tensors(tmp_path, stored_checkpoint):
    """A tied Llama whose tensors were changed."""

    def write(change):
        directory = tmp_path / "changed"
        shutil.copytree(stored_checkpoint("biases"), directory)
        tensors = load_file(directory / "model.safetensors")
        change(tensors)
        save_file(tensors, directory / "model.safetensors")
        return directory

    return write


def test_the_one_tensor_may_be_stored_as_the_head(with_tensors, stored_checkpoint):
    lm = rj.load(with_tensors(lambda tensors: tensors.update({HEAD: tensors.pop(EMBEDDING)})))
    assert lm.config.tied_head
    chex.assert_trees_all_equal(lm.params, rj.load(stored_checkpoint("biases")).params)


def test_a_second_copy_is_ignored(with_tensors, stored_checkpoint):
    lm = rj.load(with_tensors(lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].copy()})))
    assert lm.config.tied_head
    chex.assert_trees_all_equal(lm.params, rj.load(stored_checkpoint("biases")).params)


def test_another_head_is_kept(tmp_path, with_tensors):
    directory = with_tensors(lambda tensors: tensors.update({HEAD: tensors[EMBEDDING][::-1].copy()}))
    with pytest.warns(UserWarning, match=r"lm_head\.weight is another tensor, which is kept"):
        lm = rj.load(directory)
    assert not lm.config.tied_head
    np.testing.assert_array_equal(lm.params["head"]["kernel"], np.asarray(lm.params["embedding"])[::-1].T)
    # What is saved is known to be untied.
    rj.save(lm, tmp_path / "saved")
    assert not rj.load(tmp_path / "saved").config.tied_head


def test_another_head_is_kept_as_transformers_does(torch, with_tensors):
    import transformers

    directory = with_tensors(lambda tensors: tensors.update({HEAD: tensors[EMBEDDING][::-1].copy()}))
    with pytest.warns(UserWarning, match="is kept"):
        lm = rj.load(directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype="float32").eval()
    ids = np.arange(7)[None]
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)).logits.numpy()
    assert np.abs(np.asarray(lm.logits(ids, np.ones_like(ids))) - expected).max() <= 2e-5 * np.abs(expected).max()
