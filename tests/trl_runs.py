"""Short runs of TRL's trainers, stock and with `MBPMixin`, on tiny float64 models."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from hf_mbp import MBPConfig, MBPMixin
from tests.helpers import VOCABULARY, Recorder, build, llama_config, word_tokenizer

NO_RECOMPUTATION = {
    next(name for name in ("activation_checkpointing", "gradient_checkpointing") if hasattr(trl.SFTConfig, name)): False
}
"""TRL recomputes activations unless told otherwise; transformers has given the option another name."""

IN_FLOAT32 = 5e-7
"""TRL computes log-probabilities in float32, whatever the model's dtype: what remains is their rounding."""
IN_FLOAT64 = 1e-12

CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + ' [EOS]' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + ' w5 ' }}{% endif %}"
    "{% endfor %}"
)


class SplitPlans(MBPMixin):
    """Notes the rows, cells and items of the micro-batches of each step: `plans[step][micro-batch]`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.plans: list[list[tuple[int, int, float]]] = []
        super().__init__(*args, **kwargs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batches, count = super().get_batch_samples(*args, **kwargs)
        micro_batches = [micro_batch for batch in batches for micro_batch in batch.micro_batches]
        self.plans.append([(mb.num_rows, mb.cells, mb.num_items) for mb in micro_batches])
        return batches, count


class SplitSFT(SplitPlans, trl.SFTTrainer):
    pass


class SplitReward(SplitPlans, trl.RewardTrainer):
    pass


class SplitDPO(SplitPlans, trl.DPOTrainer):
    pass


TRAINERS: dict[str, tuple[Any, Any, Any]] = {
    "SFT": (trl.SFTTrainer, SplitSFT, trl.SFTConfig),
    "Reward": (trl.RewardTrainer, SplitReward, trl.RewardConfig),
    "DPO": (trl.DPOTrainer, SplitDPO, trl.DPOConfig),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A trainer of TRL, the kind of rows it gets, its options, and how near its gradients have to come.

    `bound` is of the relative error of all gradients together, `largest` of the difference of any entry. The gradients
    of IPO are some twenty times those of the others, as its loss is the square of a distance from 1 / (2 beta) = 5.
    `padding_free` is the option of `MBPConfig`; SFT has one of the same name for its collator.
    """

    trainer: str
    rows: str
    config: dict[str, Any] = field(default_factory=dict)
    lora: bool = False
    padding_free: bool | None = None
    compute_loss_func: Callable[..., torch.Tensor] | None = None
    bound: float = IN_FLOAT32
    largest: float = 1e-7


def divided_by_the_count(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
    """A user's loss, the mean of squared cross-entropies: another one than TRL's own."""
    losses = torch.nn.functional.cross_entropy(
        outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none"
    )
    return losses.square().sum() / num_items_in_batch


CASES = {
    "sft-text": Case(trainer="SFT", rows="text"),
    "sft-completion": Case(trainer="SFT", rows="completion"),
    "sft-chat": Case(trainer="SFT", rows="chat"),
    "sft-assistant": Case(trainer="SFT", rows="chat", config={"assistant_only_loss": True}),
    "sft-lora": Case(trainer="SFT", rows="completion", lora=True),
    "sft-bfd": Case(trainer="SFT", rows="text", config={"packing": True, "max_length": 24}),
    "sft-wrapped": Case(
        trainer="SFT", rows="text", config={"packing": True, "packing_strategy": "wrapped", "max_length": 24}
    ),
    "sft-padding-free": Case(trainer="SFT", rows="text", config={"padding_free": True, "max_length": None}),
    "sft-end-to-end": Case(trainer="SFT", rows="completion", padding_free=True),
    "sft-lora-end-to-end": Case(trainer="SFT", rows="text", lora=True, padding_free=True),
    "sft-dft": Case(trainer="SFT", rows="completion", config={"loss_type": "dft"}),
    "sft-smoothed": Case(trainer="SFT", rows="completion", config={"label_smoothing_factor": 0.1}),
    "sft-own-loss": Case(trainer="SFT", rows="completion", compute_loss_func=divided_by_the_count),
    "reward": Case(trainer="Reward", rows="pair", bound=IN_FLOAT64),
    "reward-centred": Case(trainer="Reward", rows="pair", config={"center_rewards_coefficient": 0.1}, bound=IN_FLOAT64),
    "reward-margin": Case(trainer="Reward", rows="pair-margin", bound=IN_FLOAT64),
    "dpo-sigmoid": Case(trainer="DPO", rows="preference"),
    "dpo-ipo": Case(trainer="DPO", rows="preference", config={"loss_type": ["ipo"]}, largest=2e-6),
    "dpo-precomputed": Case(trainer="DPO", rows="preference", config={"precompute_ref_log_probs": True}),
    "dpo-sft": Case(trainer="DPO", rows="preference", config={"loss_type": ["sft"]}),
}


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of the other tests, which also knows chats."""
    made = word_tokenizer()
    made.chat_template = CHAT_TEMPLATE
    return made


def words(count: int, generator: random.Random) -> str:
    """Words of which many come twice in a row, so that a model that repeats its input is right now and then."""
    made = [generator.randrange(6, VOCABULARY)]
    while len(made) < count:
        made.append(made[-1] if generator.random() < 0.4 else generator.randrange(6, VOCABULARY))
    return " ".join(f"w{word}" for word in made)


def dataset(kind: str, sizes: list[tuple[int, int, int]], *, seed: int = 0) -> Dataset:
    """Rows of one kind; `sizes` are the words of each prompt, (chosen) completion and rejected completion."""
    generator = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for prompt, chosen, rejected in sizes:
        before, good, bad = (words(size, generator) for size in (prompt, chosen, rejected))
        pair = {"chosen": f"{before} {good}", "rejected": f"{before} {bad}"}
        chat = [{"role": "user", "content": before}, {"role": "assistant", "content": good}]
        rows.append(
            {
                "text": {"text": f"{before} {good}"},
                "completion": {"prompt": before, "completion": f" {good}"},
                "chat": {"messages": chat},
                "preference": {"prompt": before, "chosen": f" {good}", "rejected": f" {bad}"},
                "pair": pair,
                "pair-margin": {**pair, "margin": generator.random()},
            }[kind]
        )
    return Dataset.from_list(rows)


def uneven_sizes(count: int, *, seed: int = 0) -> list[tuple[int, int, int]]:
    generator = random.Random(seed)
    return [(generator.randint(2, 10), generator.randint(1, 16), generator.randint(1, 16)) for _ in range(count)]


def model_of(case: Case, *, seed: int = 0) -> Any:
    """A model that is sure of some tokens, so that metrics tell: it repeats its input, and is right now and then."""
    if case.trainer == "Reward":
        return build(LlamaForSequenceClassification, llama_config(num_labels=1, initializer_range=0.2), seed=seed)
    model = build(LlamaForCausalLM, llama_config(initializer_range=0.05), seed=seed)
    embeddings = model.get_input_embeddings().weight.data
    embeddings *= 4
    model.lm_head.weight.data.copy_(embeddings)
    return model


def trainer_of(case: Case, rows: Dataset, folder: Path, *, split: bool, **changes: Any) -> Any:
    """A trainer of a case, stock or split, for two logged steps of 16 rows; `changes` go to its arguments."""
    stock_class, split_class, config_class = TRAINERS[case.trainer]
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 16,
        "max_steps": 2,
        "learning_rate": 0.01,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "use_cpu": True,
        "bf16": False,
        **NO_RECOMPUTATION,
        "max_length": 64,
    }
    init: dict[str, Any] = {}
    if split:
        # Several ranks are to be as uneven as their rows are.
        init["mbp_config"] = MBPConfig(
            max_tokens_per_micro_batch=64, on_inexact="error", balance_ranks=False, padding_free=case.padding_free
        )
    if case.lora:
        init["peft_config"] = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    if case.compute_loss_func is not None:
        init["compute_loss_func"] = case.compute_loss_func
    model = model_of(case)
    if case.trainer == "DPO":
        init["ref_model"] = model_of(case, seed=1)
    torch.manual_seed(0)  # LoRA draws its weights
    return (split_class if split else stock_class)(
        model=model,
        args=config_class(**{**defaults, **case.config, **changes}),
        train_dataset=rows,
        processing_class=chat_tokenizer(),
        **init,
    )


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Of each step: gradients, logged numbers and, of a split run, rows, cells and items of its micro-batches."""

    gradients: list[dict[str, torch.Tensor]]
    logs: list[dict[str, float]]
    plans: list[list[tuple[int, int, float]]]


def outcome_of(trainer: Any) -> Outcome:
    """Trains."""
    recorder = Recorder()
    trainer.add_callback(recorder)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "learning_rate" in log]
    return Outcome(gradients=recorder.gradients, logs=logs, plans=getattr(trainer, "plans", []))
