"""Check without training whether micro-batches are exact for a recipe.

python scripts/check.py recipes/text_classification/spam.yaml --num_rows 16
"""

import sys

from hf_mbp.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["check", *sys.argv[1:]]))
