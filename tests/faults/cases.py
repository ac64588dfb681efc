"""Every command that writes, as the harness calls it: with which arguments, and how it is gone on with."""

import dataclasses
import shutil
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Case:
    """A command.

    Attributes:
      name: for `--only`.
      arguments: of the first call; it writes `out` in the working directory, beside which the world's files lie.
      resume: what is added to go on; of commands that have no such option, nothing.
      small: runs under `small.shrink`, and therefore never cold.
      done: told by a call that has nothing left to do, in place of exit status 0.
      processes: that run it together.
    """

    name: str
    arguments: str
    resume: str = "--resume"
    small: bool = False
    done: str = ""
    processes: int = 1

    def call(self, resumed: bool) -> list[str]:
        """The words of a call."""
        return [*self.arguments.split(), *(self.resume.split() if resumed else ())]


_DATA = "--data mine.jsonl --prompt-field q --answer-field a"
_MINE = f"{_DATA} --reward reward.py:digits --max-new-tokens 4"
_EXACT = f"{_DATA} --reward exact_match --max-new-tokens 1 --temperature 1"  # on the device
_PPO = "--prompts 8 --iterations 4 --eval-every 2 --eval-prompts 8 --span-length 2 --learning-rate 0.01 --out out"
_TRAIN = "train --models alpha beta"
_EMORL = (
    "--base base --data prompts.jsonl --steps 6 --batch 4 --samples 2 --validate-every 2 --validation-prompts 4 "
    "--max-new-tokens 6 --learning-rate 0.01 --targets q v"
)
_SEARCH = "emorl search --run adapters --prompts 4 --out out"

CASES = (
    Case("train-ppo", f"{_TRAIN} {_MINE} {_PPO}"),
    Case("train-seeds", f"{_TRAIN} {_EXACT} {_PPO} --seeds 2 --samples 4"),
    Case("train-mappo", f"{_TRAIN} {_EXACT} {_PPO} --samples 4 --algo mappo"),
    Case("train-union", f"train --models ones pairs {_MINE} {_PPO}"),
    Case(
        "ablate",
        f"ablate --models alpha beta {_MINE} --iterations 2 --seeds 2 --limit 8 "
        "--set prompts=8 epochs=1 eval_prompts=8 --vary span_length=1,2 --out out",
    ),
    Case(
        "transfer",
        "transfer --models alpha beta --task skills overlap twins --max-new-tokens 2 --iterations 2 --limit 4 "
        "--set prompts=8 epochs=1 eval_prompts=8 span_length=2 --out out",
        small=True,
    ),
    Case("demo", "demo --quick --out out", resume="", small=True),
    Case("specialists", "specialists --task skills --quick --out out", resume="", small=True),
    Case("emorl-train", f"emorl train --objective brevity diversity_2 {_EMORL} --out out"),
    Case("emorl-baseline", f"emorl train --objective brevity diversity_2 --baselines dynaopt {_EMORL} --out out"),
    Case("emorl-search", f"{_SEARCH} --levels 2"),
    Case("emorl-grid", f"{_SEARCH} --method grid --step 0.25 --mode probs --memory 0.0001"),
    Case("emorl-random", f"{_SEARCH} --method random --budget 12 --space simplex --memory 0.0001"),
    Case("emorl-halving", f"{_SEARCH} --method halving --budget 8"),
    Case("emorl-agent", f"{_SEARCH} --method agent --iterations 2", small=True),
    Case("emorl-demo", "emorl demo --quick --out out", resume="", small=True),
    Case(
        "evaluate",
        f"evaluate --models alpha beta {_MINE} --limit 6 --search-prompts 8 --out out",
        resume="",
        done="holds a run already",
    ),
    Case("emorl-evaluate", "emorl evaluate --run adapters --limit 4 --out out", resume=""),
    Case("emorl-export", "emorl export --run adapters --weights 0.5 1 --out out", resume="", done="out exists already"),
    Case("two-processes", f"{_TRAIN} {_MINE} {_PPO}", processes=2),
)
SETUP = ("alpha", "beta", "ones", "pairs", "base", "mine.jsonl", "prompts.jsonl", "reward.py", "adapters")
MAKE_ADAPTERS = f"emorl train --objective brevity diversity_2 {_EMORL} --out adapters"


def furnish(directory: Path, world: Path) -> None:
    """A working directory for a case. The world's files are copies where a command may write to them."""
    directory.mkdir(parents=True)
    for name in SETUP:
        if name == "adapters":
            shutil.copytree(world / name, directory / name)
        else:
            (directory / name).symlink_to(world / name)
    for name in ("temporary", "cache"):
        (directory / name).mkdir()
