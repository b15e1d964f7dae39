// Package telemetry contains what MIC shows to operators: metrics, Events, the keys of log lines, and a timer of how
// long pods wait for their identities.
//
// It protects operators and the API server against floods: a problem is reported once for each change, however often
// its pod or machine is reconciled, the number of remembered reports is bounded, and the labels of metrics have few
// values.
package telemetry
