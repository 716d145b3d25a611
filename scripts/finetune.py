"""Fine-tune a model as a recipe says.

accelerate launch scripts/finetune.py recipes/text_classification/spam.yaml --learning_rate 3e-5
"""

import sys

from hf_mbp.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
