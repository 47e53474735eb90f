"""The child process that runs SGLang's own code."""
