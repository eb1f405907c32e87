"""Tables, plots and documents of reports, and facts about the machine: the only place for them."""
