-- Pointwise mutual information: how much more often two features fire together than chance would have it.
--
-- Grain:   scalar.
-- Reads:   nothing
-- Units:   bits: log2(n_both * n_all / (n_one * n_other)), each a count of tokens.
-- Ask it:  select mutual_information(2, 4, 5, 20)  -- 1
create or replace macro mutual_information(n_both, n_one, n_other, n_all) as
log2((n_both) * (n_all)::double / ((n_one)::double * (n_other)));
