"""What tells routers apart: pure functions of counts, scores, choices and weights."""
