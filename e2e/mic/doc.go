// Package mic tests MIC, the controller of standard mode, as a black box: with random sequences of actions and faults,
// with a crash at each write of one workload, and with named tests of single guarantees. It runs the controller's own
// code. The controller sends its HTTP requests to a fake API server and to the fake ARM in the same process, without
// sockets and with a fake clock, so that minutes of waiting take no time. One test compares the fake API server with a
// real one.
//
// The tests protect against three defects of MIC: it detaches an identity from a machine where a pod uses it, it
// detaches an identity that it did not attach, or after a fault an assignment or an attached identity is missing or
// left over.
package mic
