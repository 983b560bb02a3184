"""What a token and TLS cost: round trips by our ways, plain and secured, beside a bare program of the same run."""
