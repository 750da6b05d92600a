"""Planning, caption, question-answering, forecasting metrics."""
