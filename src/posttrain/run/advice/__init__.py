"""What a run shows and what to do about it: rules of a few lines over plain numbers. docs/troubleshooting.md has a section for each."""
