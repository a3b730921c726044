"""python -m taca_jax.evaluation COMMAND [--config NAME] key=value ...   (--help lists them)"""

import sys

from taca_jax.errors import UserError
from taca_jax.evaluation.commands import run

if __name__ == "__main__":
    try:
        run(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command keeps what is written and does the rest")
