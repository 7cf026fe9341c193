"""Results as people look at them: text for the terminal, a page of HTML, figures."""
