"""What `python -m codetr.data check` looks for, and how it tells (see `codetr.data.commands.check`)."""
