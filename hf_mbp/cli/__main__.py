"""The console command as a module, for launchers: `accelerate launch -m hf_mbp.cli train RECIPE.yaml`."""

import sys

from hf_mbp.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
