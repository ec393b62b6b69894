"""Where the conditions of a sample come from: classes, or encoded prompts."""
