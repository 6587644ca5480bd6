"""Set-up, GPU check-up, and the recipe of the bundled model."""
