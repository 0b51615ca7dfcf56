"""The cookbook: recipes to run and to fork, and what they are assembled from."""
