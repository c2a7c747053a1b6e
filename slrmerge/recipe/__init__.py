"""What to merge: recipes and mergekit configs."""
