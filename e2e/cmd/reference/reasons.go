package main

import (
	"fmt"
	"net/http"
	"strconv"
	"strings"

	"github.com/podidentity/podidentity/identity"
)

func reasonCodes(string) ([]byte, error) {
	d := newDocument("Reason codes", "package identity")
	d.paragraph("A reason code says how a request ended. It is in the error response (`reason`) and in NMI's log, and for token requests also in the metric " +
		"`podidentity_nmi_decisions_total`. A refused token request of a known pod has an Event `TokenRefused` with it. The spelling is the same everywhere. " +
		"[Where to look](../troubleshooting.md#where-to-look) has the commands, [Troubleshooting](../troubleshooting.md#reason-codes) the remedy for each code.")
	var rows [][]string
	for _, e := range identity.Explanations() {
		rows = append(rows, []string{fmt.Sprintf("[%s](../troubleshooting.md#%s)", code(string(e.Reason)), e.Reason), statuses(e), fromReference(e.Cause)})
	}
	d.table([]string{"Reason", "HTTP status", "Cause"}, rows)
	return d.Bytes(), nil
}

// fromReference changes the relative links of a text that is written for a page in docs/, so that they are valid in
// docs/reference/.
func fromReference(text string) string { return strings.ReplaceAll(text, "](", "](../") }

func statuses(e identity.Explanation) string {
	if len(e.Status) == 0 {
		return "none"
	}
	var all []string
	for _, s := range e.Status {
		all = append(all, strconv.Itoa(s)+" "+http.StatusText(s))
	}
	return strings.Join(all, " or ")
}

// reasonSections replaces the generated part of docs/troubleshooting.md: the cause and the remedy of each reason code.
func reasonSections(_ string, current []byte) ([]byte, error) {
	d := &document{}
	for _, e := range identity.Explanations() {
		d.heading(3, code(string(e.Reason)))
		d.paragraph("HTTP status: " + statuses(e) + ".")
		d.paragraph("**Cause.** " + e.Cause)
		d.paragraph("**Remedy.** " + e.Remedy)
		if e.Command != "" {
			d.paragraph("```sh\n" + e.Command + "\n```")
		}
	}
	d.WriteString("\n")
	return replaceGenerated(current, "package identity", d.Bytes())
}
