"""The part of the builder that ships inside the image."""
