"""The commands of `codetr benchmark`, a module each."""
