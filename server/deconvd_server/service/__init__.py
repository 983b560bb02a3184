"""The methods of the service. They do not depend on the transport that brings a call."""
