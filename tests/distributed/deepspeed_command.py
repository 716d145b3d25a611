"""`hf-mbp train` under DeepSpeed on CPUs, where it would compile collectives of its own, in a minute or two."""

import sys
from unittest.mock import patch

from hf_mbp.cli.finetune import main

if __name__ == "__main__":
    with patch("deepspeed.comm.torch.build_shm_op", lambda: None):
        sys.exit(main(sys.argv[1:]))
