"""The methods of the service, independent of the transport that brings a call."""
