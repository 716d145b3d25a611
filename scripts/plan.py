"""Show how a recipe would train, before it does: lengths, micro-batches, padding and memory. Needs no weights, no GPU.

python scripts/plan.py recipes/text_classification/spam.yaml --device cuda --memory_limit 8GiB
"""

import sys

from hf_mbp.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["plan", *sys.argv[1:]]))
