"""python train.py --config NAME [key=value ...]   (--help lists presets and keys)"""

from taca_jax.commands.train import main

if __name__ == "__main__":
    main()
