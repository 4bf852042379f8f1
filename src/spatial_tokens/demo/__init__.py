"""`spatial-tokens demo`: scenes and questions about them, the trained model that answers, and the stages of a projector."""
