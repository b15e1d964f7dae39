// Package mic tests MIC, the controller of standard mode, as a black box: with random sequences of actions and faults,
// with a crash at every write, and with one named test for each guarantee. It runs the controller's own code over HTTP
// against a fake API server and the fake ARM, without sockets and with a fake clock, so that minutes of waiting take no
// time. One test compares the fake API server with a real one.
//
// What it protects against: an identity detached from a machine where a pod uses it, a change to an identity that MIC did
// not attach, and anything lost or left behind, whatever fails and whenever.
package mic
