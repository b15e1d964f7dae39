// Package telemetry contains NMI's metrics, its loggers, and the Events that it writes for pods.
//
// It protects the readers of this output against the pods that cause it. No token and no secret is written. No metric
// label holds what a client chooses. The rate of Events is limited, and NMI repeats an Event only after some minutes.
package telemetry
