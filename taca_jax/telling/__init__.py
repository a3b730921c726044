"""What a command says on the terminal, and what it keeps from one start to the next."""
