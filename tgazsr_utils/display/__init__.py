"""What people look at: figures and the explorer's panels."""
