"""What ships inside the image. Standard library plus Debian's python3-zstandard and python3-cryptography only."""
