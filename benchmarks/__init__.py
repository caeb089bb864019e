"""Side-by-side runs against what others use, and their results: ``dfmath bench``."""
