"""What surrounds the program: files that may be broken or hostile, disks, memory, the terminal, secrets."""
