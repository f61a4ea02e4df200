"""What people have labelled: questions with their answers, texts with their labels; read, split, turned into tokens."""
