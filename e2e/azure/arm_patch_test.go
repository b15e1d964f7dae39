package azure

import (
	"strings"
	"testing"
)

const both = "SystemAssigned, UserAssigned"

func TestAPatchMergesIdentitiesAndFollowsItsType(t *testing.T) {
	for name, c := range map[string]struct {
		body  string
		kind  string
		names string
	}{
		"adds":                          {patchOf(both, "+"+blue.ResourceID), both, "blue red"},
		"removes":                       {patchOf(both, "+"+blue.ResourceID, "-"+red.ResourceID), both, "blue"},
		"adds what is there":            {patchOf(both, "+"+red.ResourceID), both, "red"},
		"adds it in another case":       {patchOf(both, "+"+strings.ToUpper(red.ResourceID)), both, "red"},
		"removes in another case":       {patchOf(both, "+"+blue.ResourceID, "-"+strings.ToUpper(red.ResourceID)), both, "blue"},
		"removes what is not there":     {patchOf(both, "-"+blue.ResourceID), both, "red"},
		"says nothing of identities":    {`{"tags":{"a":"b"}}`, both, "red"},
		"says nothing at all":           {`{}`, both, "red"},
		"names the types otherwise":     {patchOf("userassigned,SYSTEMASSIGNED", "+"+blue.ResourceID), both, "blue red"},
		"leaves the system's out":       {patchOf("UserAssigned", "+"+blue.ResourceID), "UserAssigned", "blue red"},
		"leaves the users' out":         {patchOf("SystemAssigned"), "SystemAssigned", ""},
		"leaves all out":                {patchOf("None"), "None", ""},
		"is empty for a type without":   {`{"identity":{"type":"SystemAssigned","userAssignedIdentities":{}}}`, "SystemAssigned", ""},
		"is null for a type without":    {`{"identity":{"type":"None","userAssignedIdentities":null}}`, "None", ""},
		"repeats what GET answered":     {`{"identity":{"type":"` + both + `","userAssignedIdentities":{"` + red.ResourceID + `":{"clientId":"x","principalId":"y"}}}}`, both, "red"},
		"names the type and no map":     {patchOf("UserAssigned"), "UserAssigned", "red"},
		"brings a null and an addition": {patchOf(both, "-"+red.ResourceID, "+"+green.ResourceID, "+"+blue.ResourceID), both, "blue green"},
	} {
		a := newTestARM(t)
		got := a.do("PATCH", setID+armV, c.body).machine(t)
		if again := a.get(setID); got.kind() != c.kind || got.names() != c.names || got.state() != "Succeeded" || again.names() != got.names() || again.kind() != got.kind() {
			t.Errorf("%s: PATCH got type %s, identities %s, state %s, then GET %s, %s; want those of the table",
				name, got.kind(), got.names(), got.state(), again.kind(), again.names())
		}
	}
}

func TestAnInvalidPatchIsRefusedAndChangesNothing(t *testing.T) {
	ghost := userAssigned("ghost", 40)
	for name, c := range map[string]struct {
		body   string
		status int
		code   string
	}{
		"not JSON":                     {`{`, 400, "InvalidRequestContent"},
		"no type":                      {`{"identity":{"userAssignedIdentities":{"` + blue.ResourceID + `":{}}}}`, 400, "InvalidParameter"},
		"unknown type":                 {patchOf("Everything"), 400, "InvalidParameter"},
		"none and more":                {patchOf("None, UserAssigned", "+"+blue.ResourceID), 400, "InvalidParameter"},
		"a map for a type without":     {patchOf("SystemAssigned", "-"+red.ResourceID), 400, "InvalidParameter"},
		"nothing left":                 {patchOf(both, "-"+red.ResourceID), 400, "MissingIdentityIds"},
		"a name in place of an ID":     {patchOf(both, "+red"), 400, "LinkedInvalidPropertyId"},
		"the ID of something else":     {patchOf(both, "+"+vmID), 400, "LinkedInvalidPropertyId"},
		"a malformed ID to be removed": {patchOf(both, "-"), 400, "LinkedInvalidPropertyId"},
		"one ID twice":                 {patchOf(both, "+"+blue.ResourceID, "-"+strings.ToUpper(blue.ResourceID)), 400, "InvalidRequestContent"},
		"neither object nor null":      {`{"identity":{"type":"UserAssigned","userAssignedIdentities":{"` + blue.ResourceID + `":true}}}`, 400, "InvalidRequestContent"},
		"an identity that is not":      {patchOf(both, "+"+blue.ResourceID, "+"+ghost.ResourceID), 400, "FailedIdentityOperation"},
	} {
		a := newTestARM(t)
		before := a.get(setID)
		a.mustRefuse(a.do("PATCH", setID+armV, c.body), c.status, c.code)
		if e := a.lastRequest(); e.Accepted || e.Code != c.code || e.Status != c.status {
			t.Errorf("%s: the refused PATCH is logged as %+v, want the status and code of the table", name, e)
		}
		if after := a.get(setID); after.kind() != before.kind() || after.names() != before.names() || after.ETag != before.ETag {
			t.Errorf("%s: the refused PATCH changed the machine from %+v to %+v", name, before, after)
		}
	}
}

func TestTheResponseHasTheIDsInTheConfiguredCasing(t *testing.T) {
	a := newTestARM(t)
	got := a.get(setID)
	const id = "/subscriptions/s/resourcegroups/Group/providers/Microsoft.ManagedIdentity/userAssignedIdentities/red"
	if one := got.Identity.UserAssignedIdentities[id]; one.ClientID != red.ClientID || one.PrincipalID != red.ObjectID {
		t.Errorf("got identities %+v, want red under its ID with resourcegroups in lower case",
			got.Identity.UserAssignedIdentities)
	}
	if got.Identity.PrincipalID != guid(91) || got.Identity.TenantID != tenant || got.ID != setID || got.Name != "set" ||
		got.Type != "Microsoft.Compute/virtualMachineScaleSets" || got.Location != "westeurope" {
		t.Errorf("scale set %+v; want its ID as added, its name, type and location, and its system-assigned identity",
			got)
	}
	if vm := a.get(strings.ToUpper(vmID)); vm.Identity != nil || vm.ID != vmID || vm.Type != "Microsoft.Compute/virtualMachines" {
		t.Errorf("virtual machine %+v; want its ID as added, its type, and no identity", vm)
	}
	for casing, want := range map[Casing]string{
		CasingAsSent: red.ResourceID, CasingLower: strings.ToLower(red.ResourceID), CasingUpper: strings.ToUpper(red.ResourceID),
	} {
		a.Change(func(s *ARMSettings) { s.Casing = casing })
		if got := a.get(setID).Identity.UserAssignedIdentities; len(got) != 1 || got[want].ClientID == "" {
			t.Errorf("casing %s: got identities %v, want only red, with its ID in this casing", casing, got)
		}
	}
	a.Change(func(s *ARMSettings) { s.Casing = CasingChanging })
	seen := map[string]bool{}
	for range 4 {
		for id := range a.get(setID).Identity.UserAssignedIdentities {
			seen[id] = true
		}
	}
	if len(seen) != 4 {
		t.Errorf("four responses with the casing \"changing\" have the IDs %v, want four different ones", seen)
	}
}

func TestTheTypeAddsAndRemovesTheSystemAssignedIdentity(t *testing.T) {
	a := newTestARM(t)
	got := a.do("PATCH", vmID+armV, patchOf("SystemAssigned")).machine(t)
	if got.kind() != "SystemAssigned" || !isGUID(got.Identity.PrincipalID) {
		t.Errorf("after a PATCH with the type SystemAssigned: identity %+v, want that type and a principal ID",
			got.Identity)
	}
	a.do("PATCH", vmID+armV, patchOf("UserAssigned", "+"+red.ResourceID))
	var changes []string
	for _, c := range a.Changes(0) {
		changes = append(changes, c.Identity)
	}
	if strings.Join(changes, " ") != SystemIdentity+" "+SystemIdentity+" "+FoldID(red.ResourceID) {
		t.Errorf("changes of the identities %v, want system twice, then red", changes)
	}
}

func TestTheErrorForAMissingIdentityNamesItAsConfigured(t *testing.T) {
	one, two := userAssigned("ghost1", 40), userAssigned("ghost2", 50)
	body := patchOf(both, "+"+two.ResourceID, "+"+one.ResourceID, "+"+blue.ResourceID)
	names := func(e armError, in func(armError) string) string {
		var out []string
		for _, id := range []Identity{one, two, blue} {
			if strings.Contains(in(e), id.ResourceID) {
				out = append(out, id.ResourceID[strings.LastIndex(id.ResourceID, "/")+1:])
			}
		}
		return strings.Join(out, " ")
	}
	text := func(e armError) string { return e.Message }
	details := func(e armError) string { return string(encode(e.Details)) }
	for naming, want := range map[Naming][2]string{
		NamedInDetails: {"ghost1", "ghost1 ghost2"}, NamedInText: {"ghost1", ""}, Unnamed: {"", ""},
	} {
		a := newTestARM(t, func(s *ARMSettings) { s.Naming = naming })
		e := a.mustRefuse(a.do("PATCH", setID+armV, body), 400, "FailedIdentityOperation")
		if got := [2]string{names(e, text), names(e, details)}; got != want {
			t.Errorf("naming %s: the error names %q in its message and its details, want %q: %+v", naming, got, want, e)
		}
		a.Change(func(s *ARMSettings) { s.LateErrors = true })
		began := a.do("PATCH", setID+armV, body)
		if began.status != 200 {
			t.Fatalf("naming %s, late errors: PATCH got %d %s, want 200", naming, began.status, began.body)
		}
		status := a.poll(began)
		if status.Status != "Failed" || status.Error == nil || status.Error.Code != e.Code || status.Error.Message != e.Message || len(status.Error.Details) != len(e.Details) {
			t.Errorf("naming %s, late errors: the operation ended as %+v, want Failed with the error of the refusal",
				naming, status)
		}
		if got := a.get(setID); got.names() != "red" || got.state() != "Failed" {
			t.Errorf("naming %s, after the failed operation: identities %s, state %s; want red, Failed",
				naming, got.names(), got.state())
		}
		if got := a.patchSet(both, "+"+blue.ResourceID).machine(t); got.names() != "blue red" || got.state() != "Succeeded" {
			t.Errorf("naming %s, after a PATCH that adds only blue: identities %s, state %s; want blue red, Succeeded",
				naming, got.names(), got.state())
		}
	}
}

func TestADeniedIdentityIsRefusedUntilTheFaultIsCleared(t *testing.T) {
	a := newTestARM(t)
	for _, c := range []struct {
		naming      Naming
		named, size int
	}{{NamedInText, 1, 0}, {NamedInDetails, 1, 1}, {Unnamed, 0, 0}} {
		a.must(a.SetIdentityFault(IdentityFault{Identity: strings.ToUpper(blue.ResourceID), Denied: true, Naming: c.naming}))
		e := a.mustRefuse(a.patchSet(both, "+"+blue.ResourceID, "+"+green.ResourceID), 403, "LinkedAuthorizationFailed")
		if strings.Count(e.Message, blue.ResourceID) != c.named || len(e.Details) != c.size || strings.Contains(e.Message, green.ResourceID) {
			t.Errorf("naming %s: got error %+v, want it to name blue as configured, and never green", c.naming, e)
		}
	}
	if got := a.patchSet(both, "-"+blue.ResourceID, "+"+green.ResourceID).machine(t); got.names() != "green red" {
		t.Errorf("after removing the denied identity, which needs no permission: identities %s, want green red",
			got.names())
	}
	a.must(a.SetIdentityFault(IdentityFault{Identity: blue.ResourceID}))
	if got := a.patchSet(both, "+"+blue.ResourceID).machine(t); got.names() != "blue green red" {
		t.Errorf("after the fault was cleared: identities %s, want blue green red", got.names())
	}
	a.must(a.SetIdentityFault(IdentityFault{Identity: blue.ResourceID, Missing: true}))
	a.mustRefuse(a.patchSet(both, "+"+blue.ResourceID), 400, "FailedIdentityOperation")
	a.ClearFaults("")
	if got := a.patchSet(both, "+"+blue.ResourceID); got.status != 200 {
		t.Errorf("after clearing all faults: PATCH got %s, want status 200", got.body)
	}
}

func TestADeletedIdentityRemainsAttached(t *testing.T) {
	a := newTestARM(t)
	a.DeleteIdentity(strings.ToUpper(red.ResourceID))
	if got := a.patchSet(both, "+"+blue.ResourceID).machine(t); got.names() != "blue red" {
		t.Errorf("after adding blue to the deleted identity red: identities %s, want blue red", got.names())
	}
	a.Change(func(s *ARMSettings) { s.Dangling = true })
	a.mustRefuse(a.patchSet(both, "+"+green.ResourceID), 400, "FailedIdentityOperation")
	if got := a.patchSet(both, "+"+green.ResourceID, "-"+red.ResourceID).machine(t); got.names() != "blue green" {
		t.Errorf("after removing the deleted identity red: identities %s, want blue green", got.names())
	}
	a.mustRefuse(a.patchSet(both, "+"+red.ResourceID), 400, "FailedIdentityOperation")

	// blue is deleted, and a new identity gets its resource ID. On the machine, the new
	// identity replaces the deleted one only when a PATCH adds it.
	a.DeleteIdentity(blue.ResourceID)
	again := blue
	again.ClientID = guid(77)
	a.must(a.DefineIdentity(again))
	client := func(r armResource) string {
		return r.Identity.UserAssignedIdentities[CasingResourcegroups.apply(blue.ResourceID)].ClientID
	}
	if got := client(a.get(setID)); got != blue.ClientID {
		t.Errorf("before a PATCH adds the new identity: client ID %s, want that of the deleted identity", got)
	}
	if got := client(a.patchSet(both, "+"+blue.ResourceID).machine(t)); got != again.ClientID {
		t.Errorf("after a PATCH added the new identity: client ID %s, want that of the new identity", got)
	}
}

func TestAnOutdatedETagIsRefused(t *testing.T) {
	a := newTestARM(t)
	patch := patchOf(both, "+"+blue.ResourceID)
	first := a.do("GET", setID+armV, "")
	tag := first.header.Get("ETag")
	if tag == "" || first.machine(t).ETag != tag {
		t.Fatalf("ETag %q in the header, %q in the body; want the same in both, and not empty",
			tag, first.machine(t).ETag)
	}
	second := a.do("PATCH", setID+armV, patch, "If-Match: "+tag)
	if got := second.machine(t).ETag; second.header.Get("ETag") != got || got == tag || a.get(setID).ETag != got {
		t.Errorf("after the PATCH: headers %s, ETag in the body %s; want the same new ETag in both", second.header, got)
	}
	a.mustRefuse(a.do("PATCH", setID+armV, patch, "If-Match: "+tag), 412, "PreconditionFailed")
	if e := a.lastRequest(); e.IfMatch != tag || e.Status != 412 {
		t.Errorf("the PATCH with an outdated ETag is logged as %+v", e)
	}
	if got := a.do("PATCH", setID+armV, patch, "If-Match: *"); got.status != 200 {
		t.Errorf("PATCH with If-Match *: got %d %s, want 200", got.status, got.body)
	}
	before := a.get(setID).ETag
	a.must(a.Detach(setID, red.ResourceID))
	a.mustRefuse(a.do("PATCH", setID+armV, patch, "If-Match: "+before), 412, "PreconditionFailed")
	a.Change(func(s *ARMSettings) { s.NoETags = true })
	if got := a.do("PATCH", setID+armV, patch, "If-Match: "+tag); got.status != 200 || got.header.Get("ETag") != "" || got.machine(t).ETag != "" {
		t.Errorf("with the setting NoETags: got status %d, headers %v, body %s; want 200 and no ETag",
			got.status, got.header, got.body)
	}
}
