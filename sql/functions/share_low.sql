-- The lower end of the 95% interval of a share: the share shrunk towards 0, the more so the fewer tokens it is of.
--
-- Grain:   scalar.
-- Reads:   nothing
-- Units:   n_hits of n_all tokens; a share from 0 to 1, and 0 of no tokens. Wilson 1927, with 1.96 standard errors.
-- Ask it:  select share_low(5, 5)  -- 0.565508505247919
create or replace macro share_low(n_hits, n_all) as
case
    when (n_all) > 0
        then greatest(
            (
                (n_hits) + 1.9208
                - 1.96 * sqrt((n_hits)::double * ((n_all)::double - (n_hits)::double) / (n_all)::double + 0.9604)
            ) / ((n_all) + 3.8416),
            0.0
        )
    else 0.0
end;
