"""What a person sees of a run: the facts on the terminal, one self-contained HTML file, a timeline for trace tools."""
