"""Several language models write one answer together, and an agent learns how much to trust each, span by span.

What is named here is imported when it is first asked for, and so are the modules.
"""

TYPE_CHECKING = False  # as in typing, without importing it
if TYPE_CHECKING:
    from rlae_jax.config import AgentConfig as AgentConfig
    from rlae_jax.config import MAPPOConfig as MAPPOConfig
    from rlae_jax.config import PPOConfig as PPOConfig
    from rlae_jax.errors import InputError as InputError
    from rlae_jax.fusion.decode import decode as decode
    from rlae_jax.fusion.ensemble import Ensemble as Ensemble
    from rlae_jax.fusion.generation import Generation as Generation
    from rlae_jax.fusion.sampling import SamplingOptions as SamplingOptions
    from rlae_jax.fusion.spec import DecodeSpec as DecodeSpec
    from rlae_jax.fusion.state import DecodeState as DecodeState
    from rlae_jax.models import LM as LM
    from rlae_jax.models import Adapter as Adapter
    from rlae_jax.models import Encoder as Encoder
    from rlae_jax.models import LoraConfig as LoraConfig
    from rlae_jax.models import init_adapter as init_adapter
    from rlae_jax.models import load as load
    from rlae_jax.models import load_adapter as load_adapter
    from rlae_jax.models import load_encoder as load_encoder
    from rlae_jax.models import save as save
    from rlae_jax.models import save_adapter as save_adapter
    from rlae_jax.ppo.train import load_policy as load_policy
    from rlae_jax.ppo.train import train as train
    from rlae_jax.ppo.train import train_seeds as train_seeds
    from rlae_jax.serving.engine import Engine as Engine
    from rlae_jax.serving.requests import Request as Request
    from rlae_jax.sharding import make_mesh as make_mesh
    from rlae_jax.version import __version__ as __version__

_HOMES = {
    "config": ("AgentConfig", "MAPPOConfig", "PPOConfig"),
    "errors": ("InputError",),
    "fusion.decode": ("decode",),
    "fusion.ensemble": ("Ensemble",),
    "fusion.generation": ("Generation",),
    "fusion.sampling": ("SamplingOptions",),
    "fusion.spec": ("DecodeSpec",),
    "fusion.state": ("DecodeState",),
    "models": (
        *("LM", "Adapter", "Encoder", "LoraConfig"),
        *("init_adapter", "load", "load_adapter", "load_encoder", "save", "save_adapter"),
    ),
    "ppo.train": ("load_policy", "train", "train_seeds"),
    "serving.engine": ("Engine",),
    "serving.requests": ("Request",),
    "sharding": ("make_mesh",),
    "version": ("__version__",),
}
__all__ = [name for names in _HOMES.values() for name in names]


def __getattr__(name: str) -> object:
    import importlib

    for module, names in _HOMES.items():
        if name in names:
            value: object = getattr(importlib.import_module(f"{__name__}.{module}"), name)
            globals()[name] = value
            return value
    whole = f"{__name__}.{name}"
    try:
        if not name.startswith("_"):
            return importlib.import_module(whole)
    except ModuleNotFoundError as error:
        if error.name != whole:
            raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
