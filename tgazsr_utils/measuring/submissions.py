"""Files that the challenge takes: what one holds, how it is written and read, and what is refused.

A file is JSON lines: who submits what, the checks of the attack, a digest of all; then a record a line, as runs keep
them. ``docs/challenge.md`` says what it proves.
"""

import json
import re
from collections.abc import Iterator
from itertools import chain, product
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from tgazsr_utils.core.seeds import digest
from tgazsr_utils.core.settings import AttackSettings, Settings
from tgazsr_utils.datasets.miniworld import TASKS
from tgazsr_utils.datasets.published_sets import DATASETS
from tgazsr_utils.measuring.published import unlike_published
from tgazsr_utils.measuring.records import AttackCheck, Record
from tgazsr_utils.measuring.tables import leaderboard, per_seed
from tgazsr_utils.measuring.trust import LARGE, STEPS
from tgazsr_utils.runtime.files import write_atomic

SETS = {"photographs": tuple(DATASETS), "mini-world": tuple(TASKS)}  # a file has all of one challenge
MINI = AttackSettings(test_eps=3.5, test_stepsize=1, test_numsteps=10)  # of the mini-world; photographs: as published
NEEDED = {"clean", "noise", "Square", *(f"PGD-{steps}" for steps in STEPS), *LARGE}  # of a check of the attack
LARGEST = 2**26  # bytes; three seeds on all published images take a fiftieth


def _printable(text: str) -> str:
    if not text.isprintable() or text != text.strip():
        raise ValueError("it should be one printable line")
    return text


Name = Annotated[str, Field(min_length=1, max_length=100), AfterValidator(_printable)]


class Submission(Settings):
    """One method, perhaps of several seeds, on all sets of a challenge."""

    method: Name
    by: Name
    checks: list[AttackCheck]  # one for each seed's weights
    records: Annotated[list[Record], Field(min_length=1)]

    @property
    def world(self) -> str:
        return self.records[0].world

    @property
    def models(self) -> dict[str, int]:
        """Digests of weights -> seeds."""
        return {r.model: r.seed for r in self.records}

    @property
    def attacked(self) -> Record:
        """One of the records under the attack, of which there is one."""
        return next(r for r in self.records if r.attack != "none")

    @property
    def protocol(self) -> str:
        """All that robust accuracy depends on but for weights and images."""
        r = self.attacked
        return f"{attack_of(r)} protocol={r.protocol!r} precision={r.precision!r}"

    @property
    def row(self) -> str:
        """In the original table's form: method, submitted by, robust, clean, average."""
        means = per_seed(self.records).mean()
        cells = [self.method, self.by, *(f"{means[kind]:.2f}" for kind in ("robust", "clean", "average"))]
        return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"

    @property
    def cost(self) -> str:
        parts = [*self.records, *self.checks]
        return f"{sum(part.seconds for part in parts):,.0f} s, {', '.join(sorted({part.device for part in parts}))}"


def write(submission: Submission, path: Path) -> Path:
    content = submission.model_dump(mode="json")
    records = content.pop("records")
    lines = [content | {"digest": digest(content, records)}, *records]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    return write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read(path: Path) -> Submission:
    """What ``write`` wrote. Raises ValueError for anything else."""
    if not path.is_file() or path.stat().st_size > LARGEST:
        raise ValueError(f"it is no file of at most {LARGEST:,} bytes")
    try:
        first, *records = [json.loads(line) for line in path.read_bytes().splitlines()] or [None]
        written = first.pop("digest")
    except (ValueError, RecursionError, AttributeError, TypeError, KeyError) as error:
        raise ValueError(f"it is not JSON lines with a digest in the first ({error})") from None
    if written != digest(first, records):
        raise ValueError("its content is not what was written: the digest is another")
    return Submission.model_validate(first | {"records": records})


def check(s: Submission) -> None:
    """Raises ValueError for what contradicts, mixes or lacks, and for what is not measured as the challenge has it."""
    for reason in chain(_contradictions(s), _faults_of_weights(s), _other_protocols(s)):
        raise ValueError(reason)
    leaderboard(s.records)  # refuses what is there twice, and other mixtures


def _contradictions(s: Submission) -> Iterator[str]:
    """What the records say that cannot be, whatever the challenge."""
    for r in s.records:
        which = f"{r.dataset[:100]!r} under {r.attack[:100]!r}, seed {r.seed}"
        attack = attack_of(r)
        if (r.attack, r.eps_255) != ((attack.label, attack.test_eps) if attack else ("none", 0)):
            yield f"{which}: its attack and epsilon are not those of its settings"
        if r.method != s.method:
            yield f"{which} is of {r.method[:100]!r}, not of {s.method!r}"
        if not (0 <= r.seed < 2**63 and r.seconds >= 0) or not re.fullmatch("[0-9a-f]{12}", r.model):
            yield f"{which}: its seed, seconds or digest of weights cannot be"
        if not all(value.isprintable() for _, value in r if isinstance(value, str)):
            yield f"{which} has text that cannot be printed"
        if r.defence or r.aware or (r.forwards, r.backwards) != (1, 0):
            yield f"{which} is answered behind a defence, by {r.forwards:g} passes; a challenge is of models alone"
        if r.n < 1 or not re.fullmatch("[0-9a-f]+", r.hits) or len(r.hits) != 2 * -(-r.n // 8):
            yield f"{which}: its bits are not one for each of {r.n} images"
        if bin(int(r.hits, 16)).count("1") != r.correct or int(r.hits, 16) % 2 ** (-r.n % 8):
            yield f"{which}: {r.correct} images are counted as right, and its bits say otherwise"
    for name in ("world", "arch", "precision", "code"):
        if len(values := {getattr(r, name) for r in s.records}) > 1:
            yield f"mixes records of several {name}: {', '.join(sorted(values))}"


def _faults_of_weights(s: Submission) -> Iterator[str]:
    """Each seed has weights of its own, made alike, whose robustness passed the check under the attack that counts."""
    of_seeds = sorted({(r.model, r.seed) for r in s.records})
    if not len(of_seeds) == len(s.models) == len(set(s.models.values())):
        yield f"mixes weights and seeds: {', '.join(f'{model} of seed {seed}' for model, seed in of_seeds)}"
    made = {re.sub(r'"seed": \d+', "", json.dumps(r.training, sort_keys=True)) for r in s.records}
    if len(made) > 1:
        yield "mixes trainings: what made the weights differs in more than the seed"
    if sorted(c.model for c in s.checks) != sorted(s.models):
        yield "lacks a check of the attack on each seed's weights (check_images > 0 makes them), or has others"
    for c in s.checks:
        if c.problems:
            yield f"robust accuracy of {c.model} is not counted, as the attack cannot be trusted: {c.problems[0]}"
        counts = [c.zero_gradients, *(outcome.correct for outcome in c.outcomes)]
        if not NEEDED.issubset(outcome.attack for outcome in c.outcomes):
            yield f"the check of {c.model} lacks an attack; it should have {', '.join(sorted(NEEDED))}"
        if not all(0 <= count <= c.n for count in counts) or not c.device.isprintable():
            yield f"the check of {c.model} counts what cannot be"
        measured = {(attack_of(r) or attack_of(c), r.world, r.precision) for r in s.records}
        if measured != {(attack_of(c), c.world, c.precision)}:
            yield f"the check of {c.model} is of another attack, world or precision"


def _other_protocols(s: Submission) -> Iterator[str]:
    if s.world not in SETS:
        yield f"is of {s.world!r}; there are challenges of {' and of '.join(SETS)}"
    wanted = list(product(dict.fromkeys(r.seed for r in s.records), SETS[s.world], ("clean", "robust")))
    have = {(r.seed, r.dataset, "clean" if r.attack == "none" else "robust") for r in s.records}
    if missing := [which for which in wanted if which not in have]:
        yield "lacks {} of {} records, such as seed {} on {}, {}".format(len(missing), len(wanted), *missing[0])
    if others := have.difference(wanted):
        yield f"{others.pop()[1]!r} is none of the challenge's sets: {', '.join(SETS[s.world])}"
    for r in s.records:
        whole = DATASETS[r.dataset].images if s.world == "photographs" else s.records[0].n
        if r.n != whole or r.left_out or r.available not in (None, r.n):
            yield f"{r.dataset} has {r.n:,} images of {whole:,}, {r.left_out} left out of {r.available or r.n:,}"
        if s.world == "mini-world" and (attack_of(r) not in (None, MINI) or r.protocol != "last"):
            yield f"{r.dataset}: {attack_of(r)}, {r.protocol}; it should be {MINI}, last"
        if s.world == "photographs" and (reason := unlike_published(r)):
            yield f"{r.dataset} is not as published: {reason}"
    if len({r.data for r in s.records}) < len(SETS[s.world]):
        yield "the same data are said to be of several sets"


def attack_of(of: Record | AttackCheck) -> AttackSettings | None:
    """None for clean images."""
    return AttackSettings.model_validate(of.settings) if of.settings else None
