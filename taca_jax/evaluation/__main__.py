"""python -m taca_jax.evaluation COMMAND [--config NAME] key=value ...   (--help lists them)"""

from taca_jax.evaluation.commands import main

if __name__ == "__main__":
    main(program="python -m taca_jax.evaluation")
