"""One question a file, one public verb a file. Analyses know nothing of each other, nor of pictures."""
