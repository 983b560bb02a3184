"""What Prometheus and Grafana see of a server under load."""
