"""The method, and only the method: models, attention, attacks, objectives, training steps, predictions."""
