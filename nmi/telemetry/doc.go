// Package telemetry has everything by which NMI reports what it does: metrics, the log with its audit records, and Events of
// pods.
//
// It protects these from the pods that cause them. No token and no secret is written. No metric label holds what a client
// chooses. The number of Events is limited, and an Event is repeated only after some minutes.
package telemetry
