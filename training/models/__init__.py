"""image and text networks; shapes only."""
