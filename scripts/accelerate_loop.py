"""Fine-tunes a text classifier in a training loop of our own, with `run_mini_batch` in place of forward and backward.

accelerate launch scripts/accelerate_loop.py --model sentence-transformers/all-MiniLM-L6-v2
"""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import load_dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

from hf_mbp import run_mini_batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2", help="Name or folder.")
    parser.add_argument("--data", default="recipes/data/spam-train.jsonl.xz", help="JSON lines with text and label.")
    parser.add_argument("--batch_size", type=int, default=64, help="Rows of an optimizer step, on each process.")
    parser.add_argument("--max_tokens", type=int, default=4096, help="Most padded tokens that run at once.")
    parser.add_argument("--max_steps", type=int, default=20, help="Optimizer steps.")
    options = parser.parse_args()

    set_seed(0)
    accelerator = Accelerator()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=2)
    mails = load_dataset("json", data_files=options.data, split="train")
    rows = [
        {**tokenizer(mail["text"], truncation=True, max_length=512), "labels": int(mail["label"] == "spam")}
        for mail in mails.select(range(min(len(mails), options.batch_size * options.max_steps)))
    ]
    loader = DataLoader(rows, batch_size=options.batch_size, shuffle=True, collate_fn=list)  # rows, not padded yet
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    for step, batch in enumerate(loader, start=1):
        report = run_mini_batch(
            batch,
            model=model,
            loss=lambda inputs: model(**inputs).loss,
            collate_fn=DataCollatorWithPadding(tokenizer),
            accelerator=accelerator,
            max_tokens=options.max_tokens,
        )
        optimizer.step()
        optimizer.zero_grad()
        accelerator.print(
            f"step {step}: loss {report.loss:.4f}, {report.num_micro_batches} micro-batches, "
            f"padding {report.padding_fraction:.1%}"
        )


if __name__ == "__main__":
    main()
