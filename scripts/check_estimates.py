"""Compares estimates of memory with real training, and prints the table.

    python scripts/check_estimates.py            print the table; takes some minutes
    python scripts/check_estimates.py --write    and put it into docs/memory.md

Small random models on a CPU. The reference is two optimizer steps of two micro-batches in plain PyTorch, and the most
memory that torch's own allocator had handed out at any time, as `torch.profiler` records it. The last row of a
micro-batch is half padding. The exit code is 1 if an estimate is more than 2 % under or 20 % over.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.profiler import ProfilerActivity, profile

from hf_mbp import MemoryEstimate, estimate_memory
from marked_table import put_table

PAGE = Path(__file__).parents[1] / "docs" / "memory.md"

MOST_UNDER, MOST_OVER = -0.02, 0.20
MIB = 2**20

BERT = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4}
TEXT = {"vocab_size": 1000}
LLAMA = {**BERT, **TEXT, "num_key_value_heads": 2}
GPT2 = {**TEXT, "n_embd": 256, "n_layer": 4, "n_head": 4, "n_positions": 512}
DISTILBERT = {**TEXT, "dim": 256, "hidden_dim": 1024, "n_layers": 4, "n_heads": 4}
T5 = {**TEXT, "d_model": 256, "d_ff": 1024, "num_layers": 4, "num_heads": 4, "decoder_start_token_id": 0}
BART = {**TEXT, "d_model": 256, **{f"{part}_layers": 4 for part in ("encoder", "decoder")}}
BART |= {f"{part}_ffn_dim": 1024 for part in ("encoder", "decoder")}
BART |= {f"{part}_attention_heads": 4 for part in ("encoder", "decoder")}

MODELS: dict[str, Callable[[int], Any]] = {
    "BERT": lambda _: transformers.BertForSequenceClassification(transformers.BertConfig(**BERT, **TEXT)),
    "DistilBERT": lambda _: transformers.DistilBertForMaskedLM(transformers.DistilBertConfig(**DISTILBERT)),
    "GPT-2": lambda _: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)),
    "Llama": lambda _: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)),
    "Qwen2": lambda _: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**LLAMA)),
    "T5": lambda _: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)),
    "BART": lambda _: transformers.BartForConditionalGeneration(transformers.BartConfig(**BART)),
    "ViT": lambda side: transformers.ViTForImageClassification(transformers.ViTConfig(**BERT, image_size=side)),
    "Mixtral": lambda _: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**{**LLAMA, "intermediate_size": 512}, num_local_experts=4)
    ),
}
"""Makes a model for a width. Layers are few and hidden units, too, so that parameters do not hide the activations."""


def _unchanged(model: Any) -> Any:
    return model


def _frozen(model: Any) -> Any:
    """All but the head and the last layer is frozen."""
    for parameter in model.bert.parameters():
        parameter.requires_grad = False
    for parameter in model.bert.encoder.layer[-1].parameters():
        parameter.requires_grad = True
    return model


def _with_lora(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=8, task_type="CAUSAL_LM", target_modules="all-linear"))


def _in_bfloat16(model: Any) -> Any:
    return model.bfloat16()


CHANGES: dict[str, Callable[[Any], Any]] = {
    "": _unchanged,
    "frozen but for a layer": _frozen,
    "LoRA": _with_lora,
    "bfloat16 weights": _in_bfloat16,
}

OPTIMIZERS: dict[str, Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]] = {
    "adamw_torch": lambda parameters: torch.optim.AdamW(parameters),
    "adamw_torch_fused": lambda parameters: torch.optim.AdamW(parameters, fused=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.01),
    "adafactor": lambda parameters: transformers.Adafactor(
        parameters, lr=0.01, scale_parameter=False, relative_step=False
    ),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, a shape, and what is changed: by hand, or by options that `estimate_memory` takes."""

    model: str
    rows: int
    width: int
    change: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What is special about the case."""
        options = [name if value is True else str(value) for name, value in self.options.items()]
        return ", ".join(filter(None, [self.change, *options])) or "float32"

    def build(self) -> Any:
        """The model, with random weights."""
        transformers.set_seed(0)
        return CHANGES[self.change](MODELS[self.model](self.width))


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a case took and what was estimated, in bytes."""

    case: Case
    real_bytes: int
    estimate: MemoryEstimate

    @property
    def error(self) -> float:
        """Relative; positive where the estimate is over."""
        return self.estimate.peak_bytes / self.real_bytes - 1

    @property
    def is_within(self) -> bool:
        """Whether the error is one that is promised."""
        return MOST_UNDER <= self.error <= MOST_OVER

    def row(self) -> str:
        """A row of the table."""
        shape = f"{self.case.rows} x {self.case.width}"
        sizes = f"{self.real_bytes / MIB:.1f} | {self.estimate.peak_bytes / MIB:.1f}"
        return f"| {self.case.model} | {shape} | {self.case.name} | {sizes} | {self.error:+.1%} |"


def examine(case: Case) -> Outcome:
    """Estimates, and then trains."""
    estimate = estimate_memory(case.build(), case.rows, case.width, **case.options)
    return Outcome(case=case, real_bytes=real_peak(case), estimate=estimate)


def real_peak(case: Case) -> int:
    """Bytes that training takes on the CPU: what is there before, and the most that the allocator adds."""
    model, inputs = case.build().train(), make_inputs(case)
    if "attn_implementation" in case.options:
        model.set_attn_implementation(case.options["attn_implementation"])
    if case.options.get("gradient_checkpointing"):
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = OPTIMIZERS[case.options.get("optimizer", "adamw_torch")](parameters)
    dtype = next((dtype for name, dtype in AUTOCAST.items() if case.options.get(name)), None)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for _ in range(2):
            train_step(model, inputs, optimizer, dtype)
    before = [*model.parameters(), *model.buffers(), *inputs.values()]
    return sum(tensor.nbytes for tensor in before) + most_allocated(profiler)


AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def train_step(model: Any, inputs: Any, optimizer: torch.optim.Optimizer, dtype: torch.dtype | None) -> None:
    """Two micro-batches, which are the same, and a step."""
    for _ in range(2):
        with torch.autocast("cpu", dtype=dtype) if dtype else nullcontext():
            loss = model(**inputs).loss
        loss.backward()
        del loss
    optimizer.step()
    optimizer.zero_grad()


def most_allocated(profiler: Any) -> int:
    """The highest sum of what the allocator handed out and took back."""
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: int(event.start_ns())):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def make_inputs(case: Case) -> dict[str, torch.Tensor]:
    """Random inputs, the last row half padding."""
    if case.model == "ViT":
        pixels = torch.randn(case.rows, 3, case.width, case.width)
        return {"pixel_values": pixels, "labels": torch.zeros(case.rows, dtype=torch.long)}
    tokens = torch.randint(5, 1000, (case.rows, case.width))
    mask = torch.ones_like(tokens)
    mask[-1, case.width // 2 :] = 0
    labels = torch.zeros(case.rows, dtype=torch.long) if case.model == "BERT" else tokens.masked_fill(mask == 0, -100)
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def all_cases() -> Iterator[Case]:
    """Each model at a small and a large width in three precisions, and what else can be chosen on some."""
    for model in MODELS:
        small, large = ((8, 32), (4, 224)) if model == "ViT" else ((8, 32), (2, 512))
        for rows, width in (small, large):
            for options in ({}, {"bf16": True}, {"fp16": True}):
                yield Case(model=model, rows=rows, width=width, options=options)
    for model in ("BERT", "Llama", "T5", "ViT"):
        for options in (
            {"gradient_checkpointing": True},
            {"gradient_checkpointing": True, "bf16": True},
            {"attn_implementation": "eager"},
            {"optimizer": "adamw_torch_fused"},
            {"optimizer": "sgd"},
            {"optimizer": "adafactor"},
        ):
            yield Case(model=model, rows=4, width=224, options=options)
    for options in ({}, {"bf16": True}, {"gradient_checkpointing": True}):
        yield Case(model="BERT", rows=2, width=512, change="frozen but for a layer", options=options)
        yield Case(model="Llama", rows=2, width=512, change="LoRA", options=options)
        yield Case(model="GPT-2", rows=2, width=512, change="LoRA", options=options)
    yield Case(model="Llama", rows=2, width=512, change="bfloat16 weights")
    yield Case(model="Qwen2", rows=64, width=8, options={"optimizer": "adafactor", "bf16": True})


HEADER = (
    "| model | rows x width | options | real MiB | estimated MiB | error |\n| --- | --- | --- | ---: | ---: | ---: |"
)


def main() -> int:
    """Print the table; return 1 if an estimate is too far off."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into docs/memory.md")
    parser.add_argument("--only", default="", help="only models whose name contains this")
    arguments = parser.parse_args()
    if arguments.write and arguments.only:
        parser.error("--write needs all rows: leave --only out")
    transformers.logging.set_verbosity_error()
    print(HEADER, flush=True)
    outcomes = []
    for case in all_cases():
        if arguments.only.lower() in case.model.lower():
            outcomes.append(examine(case))
            print(outcomes[-1].row(), flush=True)
    if arguments.write:
        put_table(PAGE, "estimates", "\n".join([HEADER, *(outcome.row() for outcome in outcomes)]))
    wrong = [outcome.row() for outcome in outcomes if not outcome.is_within]
    print(*wrong, sep="\n", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
