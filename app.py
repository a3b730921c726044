"""python app.py [--config NAME] [key=value ...]   a page in the browser (--help lists the keys)"""

from taca_jax.commands.page import main

if __name__ == "__main__":
    main()
