-- The upper end of the 95% interval of a share: above 0 even if nothing was found.
--
-- Grain:   scalar.
-- Reads:   nothing
-- Units:   n_hits of n_all tokens; a share from 0 to 1, and 1 of no tokens. Wilson 1927, with 1.96 standard errors.
-- Ask it:  select share_high(0, 5)  -- 0.434491494752081
create or replace macro share_high(n_hits, n_all) as
case
    when (n_all) > 0
        then least(
            (
                (n_hits) + 1.9208
                + 1.96 * sqrt((n_hits)::double * ((n_all)::double - (n_hits)::double) / (n_all)::double + 0.9604)
            ) / ((n_all) + 3.8416),
            1.0
        )
    else 1.0
end;
