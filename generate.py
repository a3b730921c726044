"""python generate.py --config NAME prompt="..." [key=value ...]   (--help lists them)"""

from taca_jax.commands.generate import main

if __name__ == "__main__":
    main()
